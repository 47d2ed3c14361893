"""Product recommendations for one merchant and market.

spark-submit jobs/run_logic.py --merchant abt --market US --conf-file conf/dev.yaml [--set key=value ...]
"""

import sys

from featurekit_spark.cli import run_logic_main

if __name__ == "__main__":
    sys.exit(run_logic_main())
