"""The candidate store: what an encoder made of each candidate, on disk, by id. Needs numpy and the standard library only.

`open_store` and `create` take a place and give the kind of store that it has: a Lance table on object storage (see
`thresher.pairs.store.lance`, which needs an extra), else the embedded store. Its directory holds

    manifest.jsonl      the last committed state: what a candidate is made of, and in which files they are (and a checksum)
    segment-N.seg       candidates, never changed once written: a sorted index of ids, the ids, the vectors, the extra arrays
    dead-N.rows         the rows of one segment that were deleted or have a newer version in another segment
    lock                held by the one process that writes

Every change writes new files under temporary names, syncs and renames them, and only then renames a new manifest into place; a
process that is killed at any moment leaves the last committed state, and the next writer removes what it left lying. Readers
map the files: opening costs the same for a thousand candidates as for a million. A file that is no longer named is unlinked at
once, which takes nothing away from readers that still map it (POSIX), so keep a store on a local file system.
"""

from thresher.pairs.store.candidates import CandidateStore
from thresher.pairs.store.places import create, holds_store, open_store
from thresher.pairs.store.view import Candidates

__all__ = ["CandidateStore", "Candidates", "create", "holds_store", "open_store"]
