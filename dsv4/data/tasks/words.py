"""Word lists for the generated tool calls and JSON sentences."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


CITIES = _words(
    "Paris|Rome|Oslo|Cairo|Lima|Tokyo|Delhi|Madrid|Berlin|Vienna|Prague|Dublin|Athens|Warsaw|Lisbon|Havana|Nairobi|Seoul|"
    "Sydney|Boston|Moscow|London|Zurich|Geneva|Milan|Naples|Kyoto|Dakar|Quito|Tunis|Riga|Bern"
)
FIRST_NAMES = _words(
    "Anna|Ben|Clara|David|Emma|Felix|Greta|Hugo|Ida|Jonas|Karl|Lena|Max|Nina|Oscar|Paul|Rosa|Sam|Tina|Victor|Alice|Bob|"
    "Carol|Dan|Eva|Frank|Hanna|Ivan|Julia|Kim|Leo|Mia|Noah|Olga|Peter|Ruth|Sara|Tom|Uma|Zoe"
)
TOPICS = _words(
    "cats|dogs|jazz music|red wine|green tea|solar power|old maps|train times|bread recipes|chess rules|space travel|"
    "wild birds|deep learning|garden plants|city parks|film news|book prices|cheap flights|winter boots|mountain bikes"
)
ITEMS = _words("apples|pears|books|pens|cups|lamps|chairs|tables|shirts|socks|boxes|keys|eggs|plums|bags|rings")
COLOURS = _words("red|blue|green|black|white|yellow|brown|grey|orange|pink")
WEATHER = _words("sunny|rainy|cloudy|windy|foggy|clear")
