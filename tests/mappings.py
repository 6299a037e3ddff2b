"""What Linux says of this process's memory, mapping by mapping."""

import re
from collections.abc import Iterator
from pathlib import Path


def mappings() -> Iterator[tuple[range, str, dict[str, int]]]:
    """Addresses, what is mapped ("" for nothing that has a name) and the bytes of each of Linux's
    fields (proc(5), smaps); none on other systems."""
    smaps = Path("/proc/self/smaps")
    text = smaps.read_text() if smaps.exists() else ""
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.MULTILINE)[1:]:
        head, fields = mapping.split("\n", 1)
        first, end = (int(address, 16) for address in head.split(" ", 1)[0].split("-"))
        name = head.split(maxsplit=5)[5] if len(head.split(maxsplit=5)) > 5 else ""
        kilobytes = re.findall(r"^(\w+): +(\d+) kB$", fields, flags=re.MULTILINE)
        yield range(first, end), name, {field: int(count) << 10 for field, count in kilobytes}
