"""A plugin for detect-secrets: what a token of the Hub, Kaggle or wandb looks like (it knows none of them)."""

from __future__ import annotations

import re

from detect_secrets.plugins.base import RegexBasedDetector

from utils.secrets import SHAPES

# In a notebook's JSON the quotes are escaped, which hides a bare hex key from the other plugins.
_ASSIGNED = re.compile(
    r"""(?:HF_TOKEN|WANDB_API_KEY|KAGGLE_KEY|KAGGLE_API_TOKEN)[\\"' ]*[=:][\\"' ]*([A-Za-z0-9_]{24,})"""
)


class TokenDetector(RegexBasedDetector):
    """Anything that utils/secrets.py would hide for its shape, or that a variable of such a name is set to."""

    secret_type = "Hub, Kaggle or wandb token"  # pragma: allowlist secret
    denylist = (SHAPES, _ASSIGNED)
