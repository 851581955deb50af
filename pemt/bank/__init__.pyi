from .entries import (
    entry_folder as entry_folder,
    entry_names as entry_names,
    import_official as import_official,
    read_bank as read_bank,
    read_entry as read_entry,
    read_manifests as read_manifests,
    write_entry as write_entry,
)
from .tools import (
    add_peft as add_peft,
    export_peft as export_peft,
    merge as merge,
    remove as remove,
    verify as verify,
)
