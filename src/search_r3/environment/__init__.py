"""Rewards, refresh policies, the environment of stage 2."""
