"""Whose Spark session a run uses, and who stops it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from featurekit_spark.bootstrap import Bootstrap
from featurekit_spark.config import load_settings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = pytest.mark.spark


def test_a_session_that_was_there_is_used_and_left_running(spark: SparkSession) -> None:
    boot = Bootstrap(load_settings(merchant="abt", market="US"), merchant="abt", market="US")
    assert boot.get_spark() is spark
    boot.close()
    assert spark.range(1).count() == 1
