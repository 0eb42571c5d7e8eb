"""Measurements of speed: each module is a program that prints a Markdown table and a line of JSON."""
