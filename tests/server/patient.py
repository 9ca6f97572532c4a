"""httpx.get and httpx.post with a timeout for a machine whose cores all compute: their own 5 s may pass there."""

from functools import partial

import httpx

get = partial(httpx.get, timeout=60.0)
post = partial(httpx.post, timeout=60.0)
