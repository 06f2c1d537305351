"""The Hub: data sets, and the commits that pin them. Its limits count per address, and Kaggle's machines share addresses."""

from typing import Any
from urllib.parse import quote

import pandas as pd

from utils.errors import DataError, first_line
from utils.schema import EMBEDDED, Config


def ask_hub(kind: str, name: str, revision: str | None = None) -> dict[str, Any]:
    """What the Hub knows of a repository (`kind` is models or datasets): its `sha`, its files as `siblings` with sizes.

    429 and 5xx are asked again as huggingface_hub does for files (http_backoff); its model_info does not. Raises as that.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    at = f"/revision/{quote(revision, safe='')}" if revision else ""
    url = f"{constants.ENDPOINT}/api/{kind}/{name}{at}"
    # Not where there is no network at all: that is told at once.
    answer = http_backoff("GET", url, params={"blobs": True}, headers=build_hf_headers(), retry_on_exceptions=())
    hf_raise_for_status(answer)
    return answer.json()


def explain_hub(error: BaseException) -> str:
    """What stood in the way, and what to do: a token has a limit of its own, and opens what is private or gated."""
    return f"{first_line(error)}; check the name and the network, and set HF_TOKEN where the Hub limits or gates it"


def load_hub_table(name: str, subset: str | None, revision: str | None, split: str, setting: str) -> pd.DataFrame:
    """A split of a Hub data set as it stands; raises DataError, which names `setting` as the way out."""
    from datasets import load_dataset

    try:
        return load_dataset(name, subset, revision=revision, split=split).to_pandas()
    except Exception as error:  # datasets passes on whatever requests, fsspec or pyarrow raise
        found = f"{name} could not be loaded from the Hub ({explain_hub(error)})"
        raise DataError(f"{found}, or give a local file by {setting}.") from None


def find_commits(config: Config) -> dict[str, Any]:
    """{setting: value} that pins every Hub data set which the configuration names without a revision.

    A data set that the Hub does not answer for is left out. A list has no dotted keys, so more_benchmarks is given whole.
    """
    sections = {"data.revision": config.data, "evaluate.benchmark.revision": config.evaluate.benchmark}
    found: dict[str, Any] = {key: _find_commit(section) for key, section in sections.items()}
    more = config.evaluate.more_benchmarks
    pinned = [one.model_copy(update={"revision": one.revision or _find_commit(one)}) for one in more]
    if pinned != more:
        found["evaluate.more_benchmarks"] = [one.model_dump(mode="json") for one in pinned]
    return {key: value for key, value in found.items() if value}


def _find_commit(section: Any) -> str | None:
    """The commit that a Hub data set's main branch is at; None where nothing is to be pinned, or the Hub does not answer."""
    if section.path is not None or section.revision is not None or section.name in (None, EMBEDDED):
        return None
    try:
        return ask_hub("datasets", section.name)["sha"]
    except Exception:  # offline or unknown: loading the rows says which
        return None
