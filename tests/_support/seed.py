"""The seed of a run's random inputs, the same in all of its processes, and how many of them there are."""

import os
import random

SEED = int(os.environ.setdefault("CWCLIP_TEST_SEED", str(random.SystemRandom().randrange(2**31))))

# CWCLIP_FUZZ=20 for twenty times as much random work.
LONGER = float(os.environ.get("CWCLIP_FUZZ", "1"))
