"""Reading an uploaded prompt: files of a form, or an archive as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from fastprompt.serving.http.errors import invalid

MAX_FILES = 16
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")

Upload = Mapping[str, bytes] | bytes


async def read_upload(request: Request) -> Upload:
    """Files by name out of `multipart/form-data`, or the bytes of an archive, alone in a form or as the whole body.

    The gate counts what comes and ends the request where it is too much; files of a form wait on disk meanwhile.
    Errors: ApiError.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    data = await _form(request) if kind == "multipart/form-data" else await _raw(request)
    if not data:
        raise invalid("the upload is empty: send a prompt's files, or an archive of them")
    return data


async def _raw(request: Request) -> bytes:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
    return bytes(data)


async def _form(request: Request) -> Upload:
    try:
        form = await request.form(max_files=MAX_FILES, max_fields=MAX_FILES)
    except HTTPException:
        raise
    except (ValueError, LookupError) as error:  # a charset or a boundary that is none
        raise invalid(f"the form cannot be read: {error}", code="invalid_form") from None
    try:
        files = await _files(form)
    finally:
        await form.close()
    if len(files) == 1 and next(iter(files)).lower().endswith(ARCHIVES):
        return next(iter(files.values()))
    return files


async def _files(form: FormData) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for field, value in form.multi_items():
        if not isinstance(value, UploadFile):
            raise invalid(f"form field {field[:80]!r} is no file: send files only", code="invalid_form")
        name = PurePosixPath((value.filename or "").replace("\\", "/")).name
        if name in files:
            raise invalid(f"two files are named {name[:80]!r}", code="invalid_form")
        files[name] = await value.read()
    return files
