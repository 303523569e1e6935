"""The engine in one C++ file: built at first use, its weights packed once and mapped."""
