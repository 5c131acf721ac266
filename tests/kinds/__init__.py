"""Random deltas by method, for tests that want one of every kind; see :mod:`tests.deltas_of_every_kind`."""
