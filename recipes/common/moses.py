"""Moses tokenisation (Koehn et al., 2007), with the library sacremoses."""

from multiprocessing import Pool
from typing import Any, Callable, Iterable, Iterator, List

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.common.corpus import Pair

CHUNK = 1000  # pairs sent to a worker process at a time


def _sacremoses() -> Any:
    try:
        import sacremoses
    except ImportError:
        raise ConfigurationError("this recipe needs the library sacremoses; pip install sacremoses") from None
    return sacremoses


class Tokeniser:
    """Callable: one sentence -> its tokens, separated by spaces.

    normalise: first normalise punctuation as Moses does, and remove control characters. split_dashes: "well-known" becomes
    "well @-@ known". lowercase: lowercase the tokens.
    """

    def __init__(self, language: str, normalise: bool = False, split_dashes: bool = False, lowercase: bool = False):
        library = _sacremoses()
        self.tokenizer, self.split_dashes, self.lowercase = library.MosesTokenizer(language), split_dashes, lowercase
        self.normalizer = library.MosesPunctNormalizer(language) if normalise else None

    def __call__(self, sentence: str) -> str:
        if self.normalizer is not None:
            sentence = "".join(letter for letter in self.normalizer.normalize(sentence) if letter.isprintable())
        tokens = self.tokenizer.tokenize(sentence, aggressive_dash_splits=self.split_dashes, return_str=True)
        return tokens.lower() if self.lowercase else tokens


def detokeniser(language: str) -> Callable[[str], str]:
    """A function from tokens separated by spaces to the sentence."""
    moses = _sacremoses().MosesDetokenizer(language)
    return lambda tokens: moses.detokenize(tokens.split())


def tokenise_pairs(pairs: Iterable[Pair], source: Tokeniser, target: Tokeniser, *, workers: int = 1) -> Iterator[Pair]:
    """Tokenise pairs with `workers` processes, keeping their order."""
    if workers == 1:
        yield from (Pair(source(pair.source), target(pair.target)) for pair in pairs)
        return
    with Pool(workers, _set_tokenisers, (source, target)) as pool:
        yield from pool.imap(_tokenise, pairs, CHUNK)


TOKENISERS: List[Tokeniser] = []  # set in each worker process


def _set_tokenisers(*tokenisers: Tokeniser) -> None:
    TOKENISERS[:] = tokenisers


def _tokenise(pair: Pair) -> Pair:
    return Pair(*(tokenise(sentence) for tokenise, sentence in zip(TOKENISERS, pair)))
