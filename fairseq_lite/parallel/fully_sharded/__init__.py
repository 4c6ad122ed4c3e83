"""`--ddp-backend fully_sharded`: its flags, its engines, and how a model is built in parts."""
