"""A base model from token shards, in Baichuan-M1's stages."""
