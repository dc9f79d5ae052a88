"""Exports checkpoints to folders that Hugging Face's transformers loads. Needs the library safetensors, but not transformers.

    fairseq                                       transformers
    transformer_moe, gshard or topk, pre-norm     NllbMoe         sequence_to_sequence.py
    transformer, dense, pre-norm                  M2M100
    transformer, dense, post-norm                 FSMT
    transformer_lm, dense, pre-norm               XGLM            language_model.py
    roberta, dense                                Roberta         masked_lm.py

source.py reads a checkpoint, generation.py and tokenizer.py write what decoding and text need, and folder.py writes it all.
"""
