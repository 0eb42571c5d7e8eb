"""Parsing query parameters and the Accept header."""

from __future__ import annotations

import pytest

from app.api.request_head import preferred_media_type


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", "application/json"),
        ("image/pngx", "application/json"),
        ("IMAGE/PNG", "image/png"),
        ("image/*", "image/png"),
        ("*/*;q=0.1, image/webp", "image/webp"),
        ("application/json;q=0.2, image/png;q=x", "image/png"),
        ("image/webp;level=1;q=0.25, image/png;q=0.2", "image/webp"),
        ("image/webp ; q=0.9 , image/png ; q=0.8", "image/webp"),
        ("image/webp;q=0.1;q=0.9, image/png;q=0.5", "image/png"),  # only the first q counts
        ("image/*;q=0.2, image/webp;q=0.1", "image/png"),  # for image/webp, its own q counts, not the q of image/*
        ("image/png;q=0, image/webp;q=0, application/*;q=0.001", "application/json"),
        (
            "image/webp;q=0.5000, image/png",
            "image/png",
        ),  # a q of four digits is invalid, and counts as 1; of equal types, the first wins
        ("image/webp;q=2, image/png", "image/png"),  # a q of 2 is invalid, too
        ("application/json;q=1, image/png", "application/json"),  # without q, a type weighs 1
    ],
)
def test_weights_and_ranges_of_an_accept_header(accept: str, expected: str) -> None:
    assert preferred_media_type(accept, ("application/json", "image/png", "image/webp")) == expected
