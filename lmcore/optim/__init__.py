"""Optimizers, parameter groups and schedules.

Start with optimizer.py (one optimizer for a whole model) or, for a model of your own, with muon.py; reference.py shows
the mathematics in a few lines.
"""
