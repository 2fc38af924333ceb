"""JSON as it is sent: compact, with letters as they are. One encoder, as making one takes longer than a chunk does."""

from __future__ import annotations

import json

encode_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
