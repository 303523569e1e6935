"""A model that answers: dialogues, masks by role, full weights or LoRA."""
