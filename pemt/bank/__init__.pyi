from .adding import (
    Adapter as Adapter,
    Added as Added,
    add_peft as add_peft,
    is_made_of as is_made_of,
)
from .entries import (
    import_official as import_official,
    read_bank as read_bank,
    read_entry as read_entry,
    write_entry as write_entry,
)
from .manifests import (
    PROMPT as PROMPT,
    BankError as BankError,
    Manifest as Manifest,
    check_one_base as check_one_base,
    chosen_entries as chosen_entries,
    entry_folder as entry_folder,
    entry_names as entry_names,
    manifest_of as manifest_of,
    manifests_in as manifests_in,
    read_shapes as read_shapes,
    site_names as site_names,
)
from .nearest import rank_entries as rank_entries
from .sharing import (
    ENTRY_FILES as ENTRY_FILES,
    Changes as Changes,
    check_entries as check_entries,
    compare as compare,
    merge as merge,
    move_entries as move_entries,
)
from .tools import export_peft as export_peft, remove as remove, verify as verify
