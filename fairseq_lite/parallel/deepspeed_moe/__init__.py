"""`--ddp-backend deepspeed_moe`: its flags, DeepSpeed's groups of ranks, and its ZeRO."""
