"""The tasks that ship; every module of this folder is one or a family of them."""
