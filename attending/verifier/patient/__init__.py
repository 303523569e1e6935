"""Simulated patients, who tell what they are asked."""
