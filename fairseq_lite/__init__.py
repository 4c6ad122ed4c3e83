"""fairseq-lite: train and evaluate sequence models with fairseq's commands, data and checkpoints.

Importing the package registers nothing and reads no file; `fairseq_lite.builtins.load_builtins()`
imports the modules that ship entries, and `fairseq_lite.hub.load()` is the way in from Python.
"""

__version__ = "0.1.0"
