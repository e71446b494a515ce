"""Rollouts without gradient, made cheaper."""
