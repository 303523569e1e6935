"""Reinforcement learning from the verifier: Baichuan-M2's improved GRPO in three stages."""
