from .adding import Adapter as Adapter, Added as Added, add_peft as add_peft
from .entries import (
    import_official as import_official,
    read_bank as read_bank,
    read_entry as read_entry,
    write_entry as write_entry,
)
from .manifests import (
    PROMPT as PROMPT,
    BankError as BankError,
    chosen_entries as chosen_entries,
    entry_folder as entry_folder,
    entry_names as entry_names,
    listed_tensors as listed_tensors,
    manifest_of as manifest_of,
    read_shapes as read_shapes,
    site_names as site_names,
)
from .tools import export_peft as export_peft, merge as merge, remove as remove, verify as verify
