"""A pipeline's statistics, which the tests of all their readers share."""

from alert_broker.stream.stats import Stats


def busy_stats() -> Stats:
    """Two partitions, 1000 + 250 consumed; 12 in flight, 7 revoked."""
    stats = Stats()
    first, second = ("ztf", 0), ("ztf", 1)
    stats.ledger.add(first, consumed=1007)
    stats.ledger.add(first, published=900, filtered=90, dead_lettered=10)
    stats.ledger.revoke(first)
    stats.ledger.add(second, consumed=250, published=238)
    stats.lag = {first: 40, second: 2}
    for milliseconds, times in ((3, 30), (20, 60), (80, 9), (700, 1)):
        stats.observe("inference", milliseconds / 1000, times)
        stats.observe("end-to-end", milliseconds / 500, times)
    for size in (1, 128, 200):
        stats.batch(size)
    stats.queue_depths = {"decode": 3, "publish": 0}
    stats.classes.update({"SNIa": 700, "AGN": 438})
    stats.reasons.update({"does not decode": 8, 'schema "x"\\ unknown\n': 2})
    stats.cutouts = {"scored": 1131, "the packet lacks an image": 7}
    stats.models = {"t2-gr": "ab" * 32}
    stats.ready = True
    return stats
