"""Judges: does an answer meet a criterion?"""
