"""The seed of a run's random inputs, the same in all of its processes."""

import os
import random

SEED = int(os.environ.setdefault("CWCLIP_TEST_SEED", str(random.SystemRandom().randrange(2**31))))
