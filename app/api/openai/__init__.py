"""OpenAI-compatible endpoints: completions and image generations."""
