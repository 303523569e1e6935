"""Learning from preferences and answers: Baichuan-M1's ELO, TDPO and PPO, and DPO beside them."""
