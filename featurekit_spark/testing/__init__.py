"""For tests of features, shipped with the library: fakes, behaviour suites, a Spark session, the parity
check.

* `fakes`: ProductDBFake, InteractionDBFake, CountingLLM, MovingClock
* `behaviour`: CacheBehaviour, to run on a cache of your own
* `vectors`: VectorIndexBehaviour, to run on a vector index of your own
* `parity`: assert_parity, the same answers per key, in batches and on Spark
* `spark`: spark_session, one small session for a suite
* `chat`: chat_server, a model behind the OpenAI protocol on a loopback port
* `redis`: redis_server, a real one on a loopback port
* `qdrant`: qdrant_server, a stand-in for one on a loopback port
* `samples`: catalogs from a seed

Needs no test framework; but for the catalog of `featurekit demo`, nothing here is imported by the rest of the library.
"""

from __future__ import annotations
