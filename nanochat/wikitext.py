"""Wikitext → prose: the articles of a Wikipedia dump without their markup.

Wikitext nests (templates in templates, links in captions) and regular expressions do not, so each
rule takes only what has nothing nested in it any more, and the table of rules runs until the text
no longer changes. No rule's time may grow with the square of a text: hence `*+` and `++`, which never
give back, a look behind for the start of a run, and the bounds. Faster than a parser of the whole
syntax, and the words that stay are the same: test_cleaning_keeps_the_words_that_mwparserfromhell_keeps.

Sources: the export format, mediawiki.org/wiki/Help:Export; en.wikipedia.org/wiki/Help:Wikitext.
"""

import html
import re
from collections.abc import Iterator
from io import BufferedIOBase
from xml.etree import ElementTree

LISTS = (  # sections without prose
    "References|Notes|Footnotes|Citations|Notes and references|References and notes|Sources"
    "|See also|External links|Further reading|Bibliography|Works cited|Literature|Publications"
    "|参考文献|參考文獻|参考资料|參考資料|注释|註釋|脚注|外部链接|外部連結|参见|參見|相关条目|延伸阅读|延伸閱讀"
)
MEDIA = "File|Image|Media|Category|文件|档案|檔案|图像|分类|分類|simple|zh-[a-z-]+|[a-z]{2,3}"
BLOCKS = "ref|gallery|math|timeline|source|syntaxhighlight|score|imagemap|hiero"
LAST = "lang|lang-[^|{}]*+|transl|nowrap|nobold|small|smaller|big|abbr|angbr|keypress|sc|vr|mvar"
FIRST = "nihongo|vanchor|visible anchor|val|quote|blockquote|cquote|quotation|nts|unicode"
LINKED = r"(?:[^\[\]]|\[(?!\[)|\](?!\]))*"  # what may stand in a link: single brackets too
MEASURE = r"\{\{\s*(?:convert|cvt)\s*\|"
# "\0" marks headings until it is known what stands under them.
MARKUP = [  # pattern, replacement, what it is and why it goes or stays
    (r"(?s)<!--.*?-->", "", "notes among editors"),
    (rf"(?is)<({BLOCKS})\b[^<>]*?(?:/>|>.{{0,99999}}?</\1\s*>)", "", "footnotes, pictures, formulas, code"),
    (rf"(?im)^(==+)[ \t]*(?:{LISTS})[ \t]*\1[ \t]*$(?:\n(?!==).*|\n\1=.*)*", "", "lists, with subsections"),
    (r"(?m)^(={2,6})[ \t]*+(.+?)(?<![ \t])[ \t]*+\1[ \t]*$", "\0\\2", "headings keep their words"),
    (r"__[A-Z]+__", "", "switches such as __NOTOC__"),
    (r"-\{[HT]\|.{0,999}?\}-", "", "Chinese conversion rules that show nothing"),
    (r"-\{(?:[^{}]*?zh-(?:hans|cn)\s*:|[^{};:]*:)?([^{};]*+)[^{}]*+\}-", r"\1", "else the simplified form"),
    (rf"(?i)\[\[\s*(?:{MEDIA})\s*:{LINKED}\]\]", "", "pictures, categories, other languages"),
    (rf"\[\[(?:[^\[\]|]*\|)?({LINKED})\]\]", r"\1", "links keep what they show"),
    (r"\[(?:https?:|ftp:)?//[^\s\[\]]++\s*+([^\[\]]*+)\]", r"\1", "links to the web keep their label"),
    (rf"(?i)({MEASURE}[^{{}}]*?\|)([CF])(?=[|}}])", r"\1°\2", "degrees, before the next rule"),
    (rf"(?i){MEASURE}([^{{}}|]*)\|(?:(to|and|or|by|x|-|–)\|([^{{}}|]*)\|)?([^{{}}|]*+)[^{{}}]*+\}}\}}",
     r"\1 \2 \3 \4", "measures as they were given: '5 to 7 km'"),
    (rf"(?i)\{{\{{\s*(?:{LAST})\s*\|(?:[^{{}}]*\|)?(?:1=)?((?!\s*[a-z]+\s*=)[^{{}}|]*+)(?:\|[^{{}}]*)?\}}\}}",
     r"\1", "marked words: the last field without a name"),
    (rf"(?i)\{{\{{\s*(?:{FIRST})\s*\|([^{{}}|]*+)[^{{}}]*+\}}\}}", r"\1", "quotations, names"),
    (r"\{\{\s*(HMS|USS|RMS|SS|MV)\s*\|([^{}|]*+)[^{}]*+\}\}", r"\1 \2", "names of ships"),
    (r"(?i)\{\{\s*(?:snd|spaced ndash|ndash)\s*\}\}", " – ", "dashes"),
    (rf"(?i)\{{\{{(?!\s*(?:{LAST}|{FIRST})\s*\|)(?:[^{{}}]|\{{(?!\{{)|\}}(?!\}}))*\}}\}}", "",
     "other templates: boxes, citations, warnings"),
    (r"(?sm)^[ \t:*]*\{\|(?:(?!\n[ \t:*]*\{\|).)*?(?<!\n)\n\s*+\|\}", "", "tables"),
    (r"(?<=\d)<sup>([-−–+]?\d+)</sup>", r"^\1", "10 to the 6th is not 106"),
    (r"<br\s*/?>", " ", "line breaks"),
    (r"</?[a-zA-Z][^<>]*>", "", "other HTML tags, not what they enclose"),
    (r"''+", "", "italic and bold"),
]
REMAINS = [  # once all markup is gone
    (r"&nbsp;|[\t\xa0]", " ", "kinds of space"),
    (r"(?m)^[*#:;].*\bISBN\b.*$", "", "lists of books"),
    (r"(?m)^[*#:;]+[ \t]*", "", "marks of lists and indents"),
    (r"([(（])[ ,;:，；]+", r"\1", "what templates leave in parentheses"),
    (r"(?<![ ,;:，；])[ ,;:，；]++([)）])", r"\1", "likewise at the end of them"),
    (r" ?(?:\(\)|（）|\[\])", "", "parentheses left empty"),
    (r" +(?=[,.;:]?(?:[ \n]|\Z))", "", "double spaces, and those before a stop or a line's end"),
    (r"(?m)^ +", "", "spaces that begin a line"),
    (r"(?m)^[^\w\n\0]+$", "", "lines without a letter, where a formula was"),
    (r"\n{3,}", "\n\n", "more than one blank line"),
    (r"\0.*+\s*+(?=\0|\Z)", "", "headings with nothing under them"),
]
DEEPEST = 100  # rounds, one for each level of nesting; MediaWiki itself stops at 100
TABLES = [[(re.compile(pattern), by) for pattern, by, _ in table] for table in (MARKUP, REMAINS)]
STRAY = re.compile(r"\[\[[^\[\]|\n]*\||\[\[|\]\]|\{\{|\}\}|\0")  # brackets that were never closed
NO_ARTICLE = re.compile(  # a redirect in an old dump, or a page that tells homonyms apart
    r"(?is)\s*#(?:redirect|重定向)|.*\{\{\s*+(?:disambig|dab|hndis|geodis|消歧义|消歧義"
    r"|[^{}|]{0,99}\bdisambiguation(?! needed))\s*+[|}]"
)


def clean(wikitext: str) -> str:
    """The prose of an article as plain text: paragraphs and headings, no markup."""
    for table in TABLES:
        for _ in range(DEEPEST):
            before = wikitext
            for pattern, replacement in table:
                wikitext = pattern.sub(replacement, wikitext)
            if before == wikitext:
                break
    return html.unescape(STRAY.sub("", wikitext)).replace("\xa0", " ").strip()


def articles(file: BufferedIOBase) -> Iterator[tuple[str, str]]:
    """(title, wikitext) of a dump's articles: namespace 0, no redirects, no disambiguation pages.

    Raises ElementTree.ParseError for broken XML. Memory stays bounded whatever the dump's size.
    """
    events = ElementTree.iterparse(file, events=("start", "end"))
    _, root = next(events)
    for event, page in events:
        if event == "end" and page.tag.endswith("}page"):
            wikitext = page.findtext("{*}revision/{*}text") or ""
            is_article = page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None
            if is_article and not NO_ARTICLE.match(wikitext):
                yield page.findtext("{*}title") or "", wikitext
            root.clear()  # or the pages read so far would stay in memory
