"""Sizes on which the shapes of results depend. Functions of shapes alone, so that sums always have the same order."""

BIAS_TILE = 128  # rows that make one partial sum for the gradient of a bias
COMBINE_TILE = 32  # the same in the backward of combine, which reads whole rows
BLOCK = 1024  # pairs that are counted at once
PART_TOKENS, PART_EXPERTS, PART_COLUMNS = 256, 32, 64  # of one partial sum for the gradient of the router's weights
ROUTE_TOKENS = 128  # that make one partial sum for the auxiliary losses
PROGRAMS = 256  # enough for any GPU


def num_tiles(rows: int, num_experts: int, tile: int) -> int:
    """The most tiles that N rows can need, those behind the last expert included."""
    return -(-rows // tile) + num_experts + 1


def num_blocks(pairs: int) -> int:
    """Blocks of P pairs, at least one."""
    return max(-(-pairs // BLOCK), 1)


def num_parts(tokens: int, num_experts: int, width: int) -> int:
    """Partial sums over S tokens for [E, M]: more of them where a single one has too few programs."""
    each = -(-num_experts // PART_EXPERTS) * -(-width // PART_COLUMNS)
    return max(min(-(-tokens // PART_TOKENS), PROGRAMS // each), 1)


def num_route_blocks(tokens: int) -> int:
    """Partial sums over S tokens for the auxiliary losses, at least one."""
    return max(-(-tokens // ROUTE_TOKENS), 1)
