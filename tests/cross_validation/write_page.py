"""Measures every cell, or those named, and writes the record and the page: about half an hour."""

from __future__ import annotations

import argparse
import json
import re
import warnings

import torch
from judged_page import PAGE, page
from judged_record import RECORD, as_json, measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names to measure anew, as a regular expression")
    parser.add_argument("--render", action="store_true", help="write the page of the record alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of what curvlinops imports, and of modes that warn
    earlier = json.loads(RECORD.read_text()) if arguments.only or arguments.render else {}
    results = earlier
    if not arguments.render:
        chosen = re.compile(arguments.only)
        results = measured(earlier, lambda name: bool(chosen.search(name)), print)
        RECORD.write_text(as_json(results))
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
