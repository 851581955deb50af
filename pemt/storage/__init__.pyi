from .folders import (
    TEMPORARY as TEMPORARY,
    read_tensors as read_tensors,
    recover_interrupted_replace as recover_interrupted_replace,
    remove_folder as remove_folder,
    remove_partial_writes as remove_partial_writes,
    replacing as replacing,
    save_tensors as save_tensors,
    write_folder as write_folder,
    write_text as write_text,
)
from .hub import (
    HubError as HubError,
    check_hub as check_hub,
    download as download,
    local_folder as local_folder,
    upload as upload,
)
from .json_values import Count as Count, Positive as Positive, checked as checked
from .manifest import (
    MANIFEST as MANIFEST,
    StorageError as StorageError,
    check_file as check_file,
    read_manifest as read_manifest,
)
from .tensor_file import TensorFile as TensorFile, open_tensors as open_tensors
