"""Files to train on: from a JSONL or CSV file to encoded examples, or to the list of its bad rows."""

from server.tuning.data.encoded_file import EncodedFile
from server.tuning.data.prepare import REPORT_FILE, TRAIN_FILE, VALID_FILE, Prepared, prepare
from server.tuning.data.problems import DataWarning

__all__ = ["REPORT_FILE", "TRAIN_FILE", "VALID_FILE", "DataWarning", "EncodedFile", "Prepared", "prepare"]
