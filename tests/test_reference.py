"""The reference in docs/reference, without building it: nothing public is left out, and docstrings are read
as they are meant.
"""

import ast
import sys

from shared.runtime import ROOT

sys.path.insert(0, str(ROOT / "docs" / "reference"))
import pages  # noqa: E402

DOCSTRING = """Reads `GPT` and `idx`s, not *this* or a_.

| kind | a name |
| --- | --- |
| `flat` | |

- one, which
  goes on
- two

    >= 4 spaces
        are code

    x = 1

Of a list:
>>> 1 + 1
2
"""
RST = r"""Reads :py:obj:`GPT <shared.models.gpt.GPT>` and ``idx``\ s, not \*this\* or a\_.

.. list-table::
   :header-rows: 1

   * - kind
     - a name
   * - ``flat``
     - 

- one, which
  goes on
- two

.. code-block:: text

    >= 4 spaces
        are code

    x = 1

Of a list:

>>> 1 + 1
2
"""  # noqa: W291


def test_a_docstring_is_read_as_it_is_meant():
    assert "\n".join(pages.to_rst(DOCSTRING.splitlines())) == RST


def test_every_module_has_a_page_and_every_public_name_stands_under_its_week(tmp_path):
    pages.write_pages(tmp_path / "pages")
    written = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "pages").iterdir()}
    index = written.pop("by_week.txt")
    assert len(written) > 150
    for name, tree in pages.STRUCTURE.trees.items():
        if name != "shared":
            assert f".. automodule:: {name}\n" in written[f"{name}.rst"]
        for node in tree.body:
            if isinstance(node, pages.PUBLIC) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{name}.{node.name} has no docstring"
                assert f"`{node.name} <{name}.{node.name}>`" in index


def test_a_package_that_hands_names_on_says_which():
    """`__all__` is what an IDE goes by: without it, type checkers take what was imported for private."""
    for package in pages.STRUCTURE.packages:
        lists = [node for node in pages.STRUCTURE.trees[package].body if isinstance(node, ast.Assign)]
        names = [ast.literal_eval(node.value) for node in lists if ast.unparse(node.targets[0]) == "__all__"]
        assert sorted(sum(names, [])) == sorted(pages.public_names(package)), package
