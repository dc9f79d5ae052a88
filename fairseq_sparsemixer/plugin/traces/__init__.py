"""--moe-trace and --moe-replay: which experts run for which words, written to a file, and routing by such a file.

files (the format), following (a layer's routing, recorded or replaced), training and commands (where fairseq's commands
are followed), options (the flags).
"""
