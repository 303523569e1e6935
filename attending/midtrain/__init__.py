"""Medical knowledge into a model that keeps what it knew: Baichuan-M2's domain stage."""
