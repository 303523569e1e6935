"""A draft head for a model, trained on what the model wrote: EAGLE-3 (Baichuan-M2 and M3)."""
