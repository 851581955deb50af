from .folders import (
    TEMPORARY as TEMPORARY,
    copy_files as copy_files,
    move_files as move_files,
    recover_interrupted_replace as recover_interrupted_replace,
    remove_folder as remove_folder,
    remove_partial_writes as remove_partial_writes,
    replacing as replacing,
    save_tensors as save_tensors,
    tensor_writer as tensor_writer,
    write_folder as write_folder,
    write_folders as write_folders,
    write_text as write_text,
)
from .hub import (
    HubError as HubError,
    check_hub as check_hub,
    commit_files as commit_files,
    commit_of as commit_of,
    download as download,
    fetch_files as fetch_files,
    hub_is_asked as hub_is_asked,
    licence_in as licence_in,
    local_folder as local_folder,
    make_repository as make_repository,
    upload as upload,
)
from .json_values import Count as Count, Positive as Positive, checked as checked
from .manifest import (
    MANIFEST as MANIFEST,
    StorageError as StorageError,
    check_file as check_file,
    read_manifest as read_manifest,
    sha256 as sha256,
)
from .tensor_file import TensorFile as TensorFile, open_tensors as open_tensors
