"""The base of every YAML section that we compute with: frozen, and strict about the names of its keys."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A section of a configuration.

    A key may be spelled with hyphens or underscores. A null is as good as leaving the key out, unless the field says
    what None means.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _spell(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        spelled: dict[str, Any] = {}
        for key, value in values.items():
            name = key.replace("-", "_") if isinstance(key, str) and key.replace("-", "_") in fields else key
            field = fields.get(name)
            if value is None and field is not None and field.default is not None and not field.is_required():
                if name == "ssh_port":
                    spelled[name] = None
                continue
            spelled[field.alias if field is not None and field.alias else name] = value
        return spelled
