"""The main job in plain pandas, from start to end each time. `python peer_pandas.py CATALOG.csv WAREHOUSE`"""

from __future__ import annotations

import json
import sys

import peer_steps


def main(catalog: str, warehouse: str) -> None:
    titles = peer_steps.titles_of(peer_steps.read_products(catalog))
    recommendations = peer_steps.recommend(peer_steps.embed(titles), peer_steps.suggest(titles))
    peer_steps.publish(recommendations, warehouse)
    print(json.dumps({"llm_calls": peer_steps.llm_calls.total()}))


if __name__ == "__main__":
    main(*sys.argv[1:3])
