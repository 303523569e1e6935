"""Raw text to clean, de-identified, deduplicated, scored, mixed, packed token shards."""

import os

os.environ.setdefault("TQDM_DISABLE", "1")  # before datatrove is imported: its bars cross ours
