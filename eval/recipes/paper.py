"""What the paper (Chen et al., ICLR 2025) measured: its tables, to be read beside ours. Figures are there as pictures.

Rows are average bits and the task's metrics as printed: ROUGE-L and BERTScore, of translations BLEU and sacreBLEU.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "BASE_H",
    "BASE_L",
    "DNS",
    "HIGH_LOW",
    "LEARNED",
    "LOW_HIGH",
    "LOW_LOW",
    "PAPER",
    "STATIC",
    "PaperRow",
    "of_model",
]

PaperRow = tuple[float, tuple[float, ...]]
"""Bits and scores; no scores where the paper prints none."""
Rows = Mapping[str, PaperRow]

BASE_L, BASE_H, DNS, STATIC, LEARNED = "baseline-l", "baseline-h", "DNS", "PMPD-Static", "PMPD-Learned"
LOW_LOW, HIGH_LOW, LOW_HIGH = "low prompt, low answer", "high prompt, low answer", "low prompt, high answer"
"""What the paper calls its rows."""


def _rows(*rows: PaperRow) -> Rows:
    return dict(zip((BASE_L, BASE_H, DNS, STATIC, LEARNED), rows, strict=False))


def _open_ended(*rows: PaperRow) -> Rows:
    return dict(zip((BASE_L, BASE_H, LEARNED, DNS), rows, strict=True))


def _static(*rows: PaperRow) -> Rows:
    return dict(zip((BASE_L, BASE_H, STATIC), rows, strict=True))


PAPER: Mapping[str, Mapping[str, Mapping[str, Rows]]] = {
    "table1": {
        "cnn_dailymail": {
            "Vicuna-7B": _rows(
                (2, (8.30, 78.4)), (3, (24.2, 86.9)), (2.39, (24.2, 86.8)), (2.39, (24.3, 87.0)), (2.43, (24.0, 86.7))
            ),
            "MobileLLaMA": _rows(
                (3, (16.3, 83.3)), (4, (17.2, 83.5)), (3.37, (17.4, 83.5)), (3.37, (17.6, 83.7)), (3.19, (16.6, 83.2))
            ),
            "Phi-1.5": _rows(
                (3, (13.4, 82.4)), (4, (16.2, 84.0)), (3.71, (12.4, 81.8)), (3.71, (16.2, 84.0)), (3.09, (15.5, 83.4))
            ),
        },
        "dialogsum": {
            "Vicuna-7B": _rows(
                (2, (10.2, 75.5)), (3, (24.4, 88.2)), (2.0, ()), (2.0, (25.0, 88.2)), (2.74, (24.5, 88.2))
            ),
            "MobileLLaMA": _rows(
                (3, (15.8, 84.1)), (4, (16.8, 84.9)), (3.21, (14.7, 84.4)), (3.0, (17.0, 85.0)), (3.21, (17.1, 85.0))
            ),
            "Phi-1.5": _rows(
                (3, (15.3, 85.1)), (4, (18.0, 86.1)), (3.30, (16.1, 85.7)), (3.30, (18.1, 86.2)), (3.52, (17.9, 86.1))
            ),
        },
        "iwslt": {
            "Vicuna-7B": _rows(
                (2, (1.2, 1.2)), (3, (31.6, 31.6)), (2.68, (27.6, 27.6)), (2.68, (31.0, 31.1)), (2.37, (29.9, 29.9))
            ),
            "MobileLLaMA": _rows(
                (3, (9.8, 9.83)), (4, (12.7, 12.7)), (3.65, (12.0, 12.0)), (3.65, (12.6, 12.6)), (3.48, (11.8, 11.8))
            ),
            "Zephyr-3B": _rows(
                (3, (21.1, 21.1)), (4, (30.4, 30.4)), (3.34, (28.2, 28.2)), (3.0, (29.7, 29.7)), (3.34, (29.8, 29.8))
            ),
        },
    },
    "table2": {
        "mt_bench": {
            "Vicuna-7B": _open_ended((2, (16.7, 80.4)), (3, (41.0, 89.9)), (2.68, (39.6, 88.9)), (2.68, (36.7, 88.2))),
            "Zephyr-3B": _open_ended((3, (28.6, 87.2)), (4, (40.8, 89.6)), (3.48, (40.7, 89.7)), (3.48, (35.3, 88.6))),
            "MobileLLaMA": _open_ended(
                (3, (22.3, 82.4)), (4, (28.9, 85.8)), (3.39, (29.1, 85.4)), (3.39, (25.4, 84.2))
            ),
            "Phi-1.5": _open_ended((3, (27.9, 85.7)), (4, (35.4, 87.8)), (3.56, (35.7, 87.9)), (3.56, (29.9, 86.7))),
        }
    },
    "table4": {
        "mt_bench": {
            "Vicuna-7B": {
                LOW_LOW: (2, (18.3,)),
                HIGH_LOW: (2, (28.1,)),
                LOW_HIGH: (3, (22.2,)),
            }
        }
    },
    "table5": {
        "cnn_dailymail": {
            "Llama3-8B": _static((2, (4.35, 75.8)), (3, (18.3, 85.2)), (2.66, (17.8, 84.8))),
            "Longchat-13B": _static((2, (9.29, 72.8)), (3, (19.9, 86.4)), (2.37, (19.9, 86.4))),
        },
        "dialogsum": {
            "Llama3-8B": _static((2, (5.58, 81.7)), (3, (19.0, 85.8)), (2.31, (18.7, 85.8))),
            "Longchat-13B": _static((2, (10.6, 80.8)), (3, (19.9, 86.6)), (2.0, (20.3, 86.5))),
        },
        "iwslt": {
            "Llama3-8B": _static((2, (0.0, 0.16)), (3, (23.1, 23.2)), (2.71, (22.1, 22.1))),
            "Longchat-13B": _static((2, (2.94, 2.94)), (3, (21.6, 21.6)), (2.71, (21.4, 21.4))),
        },
    },
    "table9": {
        "dialogsum": {
            "MobileLLaMA": {
                BASE_L: (3, (9.71, 82.7)),
                BASE_H: (4, (16.0, 84.2)),
                STATIC: (3.63, (16.0, 84.6)),
                LEARNED: (3.02, (14.2, 84.2)),
            }
        }
    },
}
"""By recipe, task and model: the rows by name."""


def of_model(recipe: str, task: str, model: str) -> Rows:
    """Return the paper's rows for a model, by what its name says (``vicuna-7b-v1.5``); none for another model."""
    plain = "".join(filter(str.isalnum, model.lower()))
    for name, rows in PAPER.get(recipe, {}).get(task, {}).items():
        if "".join(filter(str.isalnum, name.lower())) in plain:
            return rows
    return {}
