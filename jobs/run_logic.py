"""Product recommendations for one merchant and market.

spark-submit jobs/run_logic.py --merchant abt --market US --conf-file conf/dev.yaml [--set key=value ...]
"""

from __future__ import annotations

import sys

from featurekit_spark.cli import run_logic_main


def main(merchant: str, market: str, *options: str) -> int:
    """Run the job as the command line does; `options` are such as `"--set", "search.top_k=20"`."""
    return run_logic_main(["--merchant", merchant, "--market", market, *options])


if __name__ == "__main__":
    sys.exit(run_logic_main())
