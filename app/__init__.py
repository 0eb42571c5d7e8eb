"""The web service. It answers requests with the networks in the model store.

Training scripts and imports add networks to the store.
"""
