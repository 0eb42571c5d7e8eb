"""Tables of users."""

from __future__ import annotations

import datetime
from pathlib import Path


def write_table(folder: Path, content: str) -> Path:
    """Write a CSV file and return its path."""
    path = folder / "table.csv"
    path.write_text(content, "utf-8")
    return path


PRODUCTS = ("Äpfel", "Brötchen", "Käse")


def shop_table() -> bytes:
    """Return 16 weeks of daily sales as a shop exports them.

    There are lines above the names, cp1252, decimal commas, three products, a column of promotions, missing values
    (k.A.) and missing days.
    """
    lines = ["Umsätze der Filiale Köln;;;", "Stand: 24.04.2023;;;", "", "Datum;Artikel;Umsatz;Aktion"]
    for day in range(112):
        date = datetime.date(2023, 1, 2) + datetime.timedelta(day)
        for place, product in enumerate(PRODUCTS):
            promotion = int((day + place) % 10 < 2)
            sold = 900 * (place + 1) + 40 * (day % 7) ** 2 + 250 * promotion + 7.25 * (day * 13 % 17)
            text = f"{sold:,.2f}".translate(str.maketrans(",.", ".,"))
            if (day + 5 * place) % 29 != 11:
                lines.append(f"{date:%d.%m.%Y};{product};{'k.A.' if (day + place) % 37 == 5 else text};{promotion}")
    return "\r\n".join([*lines, ""]).encode("cp1252")
