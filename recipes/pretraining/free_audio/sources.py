"""Which Debian packages the corpus is made of, and which of their files stay out of it.

Plain data. What is held out lies behind the valid and test clips of the six small labelled tasks
(instrument, keywords, language, music, percussion, pitch) with which encoders of this corpus are
compared: a track, program, voice, prompt or kit is in the corpus or in such a clip, never in both.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """A Debian package (12, bookworm) and which of its audio is taken.

    Arguments
    ---------
    name : str
    licence : str
        Of the audio, as /usr/share/doc/<name>/copyright states it.
    domain : str
        The folder of the corpus that its audio goes to.
    pattern : str
        Regular expression to find in a file's path inside the package. Archives (.pk3, which are
        zip files, and OpenTTD's .cat) are opened, and their members' paths follow theirs.
    joined : bool
        Short files: those with the same text in the pattern's first group (a speaker, a kit), if it
        has one, are joined in a random order before they are cut. Default False.
    held_out : tuple of str
        Files that stay out, by their path from `root` on, without suffix; "/", "_" and " " are
        written as "-".
    root : str
        Default: the file's own folder.
    """

    name: str
    licence: str
    domain: str
    pattern: str
    joined: bool = False
    held_out: tuple[str, ...] = ()
    root: str = ""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


HELD_OUT_PROMPTS = _words(
    """
    agent-loggedoff agent-pass astcc-followed-by-the-pound-key cannot-complete-as-dialed
    conf-extended conf-getchannel conf-hasjoin conf-otherinparty conf-roll-callcomplete
    conf-waitforleader confbridge-begin-glorious-b confbridge-binaural-off
    confbridge-binaural-on confbridge-conf-end confbridge-has-joined confbridge-inc-talk-vol-out
    confbridge-leave-in confbridge-menu-exit-in confbridge-muted confbridge-participants
    confbridge-rest-talk-vol-in demo-echodone digits-17 digits-18 digits-50 digits-90
    digits-day-0 digits-h-11 digits-h-12 digits-h-13 digits-h-20 digits-h-40 digits-h-60
    digits-h-80 digits-h-million digits-mon-1 dir-multi3 do-not-disturb entr-num-rmv-blklist
    extension feature-not-avail-line goodbye hello-world if-correct-press letters-ascii34
    letters-ascii59 letters-ascii62 letters-ascii92 letters-asterisk letters-exclaimation-point
    location phonetic-f-p pm-invalid-option priv-recordintro privacy-incorrect privacy-unident
    queue-callswaiting queue-holdtime queue-minutes queue-reporthold queue-thankyou
    queue-thereare queue-youarenext seconds simul-call-limit-reached something-terribly-wrong
    sorry-youre-having-problems spy-console spy-h323 spy-usbradio to-extension to-rerecord-it
    vm-Cust1 vm-Cust3 vm-Cust4 vm-changeto vm-delete vm-duration vm-extension
    vm-incorrect-mailbox vm-isonphone vm-isunavail vm-leavemsg vm-login vm-num-i-have vm-onefor
    vm-onefor-full vm-repeat vm-saved vm-savedto vm-savefolder vm-star-cancel vm-starmain
    vm-tempremoved vm-theperson vm-tocancel vm-tomakecall vm-toreply
    """
)

# General MIDI programs, counted from 0
HELD_OUT_PROGRAMS = (
    *(0, 2, 6, 10, 11, 16, 20, 21, 26, 28, 29, 33, 35, 38, 41, 42, 44, 48, 52, 54, 57, 61, 63, 66),
    *(68, 69, 70, 71, 73, 74, 78, 80, 81, 85, 87, 108),
)
DRUM_PRESETS = (0, 8, 16, 24, 25, 32, 40, 48)  # of the sound font: none is held out

# espeak-ng's voice variants
HELD_OUT_VOICES = _words(
    """
    Alicia Demonic Diogo Henrique Lee Marco Michael Nguyen RicishayMax RicishayMax2 RicishayMax3
    UniRobot anika announcer antonio belinda croak ed edward edward2 grandma gustave m1 m2 m3 m4
    m5 m6 m7 m8 robosoft robosoft2 robosoft3 robosoft4 robosoft5 robosoft6 robosoft7 robosoft8
    sandro steph steph2 steph3 zac
    """
)

KITS = ("ColomboAcousticDrumkit", "ElectricEmpireKit", "Millo_MultiLayered2", "circAfrique v4")

WAV = r"\.wav$"
OGG = r"\.ogg$"
CC_BY_SA = "CC-BY-SA-3.0"

RECORDED = (
    *(
        Package(
            f"asterisk-core-sounds-{language}-wav",
            CC_BY_SA,
            "speech",
            WAV,
            joined=True,
            held_out=HELD_OUT_PROMPTS,
            root=r"asterisk/sounds/[^/]+/",
        )
        for language in ("en", "es", "fr")
    ),
    Package("tuxpaint-stamps-default", "GPL-2", "speech", r"_desc(\w*)\.ogg$", joined=True),
    Package("tuxpaint-stamps-default", "GPL-2", "effects", r"^(?!.*_desc).*\.ogg$", True),
    Package(
        "wesnoth-1.16-music",
        "GPL-2+",
        "music",
        OGG,
        held_out=(
            *("battle", "battle-epic", "breaking-the-chains", "main-menu", "northerners"),
            *("return-to-wesnoth", "suspense", "the-city-falls", "the-deep-path"),
            *("the-king-is-dead", "vengeful", "weight-of-revenge"),
        ),
    ),
    Package(
        "warzone2100-music",
        "GPL-2+",
        "music",
        r"\.opus$",
        held_out=tuple(f"track{n}" for n in (2, 4, 6, 7, 11, 15, 16, 20, 21, 25, 26, 27)),
    ),
    Package(
        "nexuiz-music",
        "GPL-2+",
        "music",
        OGG,
        held_out=(
            *("brokenlight", "infight", "neuronal-diving", "ninesix", "northern-lights"),
            *("sixtyfour-", "sixtyfour-revisited", "subcities"),
        ),
    ),
    Package(
        "hyperrogue-music",
        "CC-BY-SA-3.0 and others, by track",
        "music",
        r"/hr[^/]*\.ogg$",
        held_out=(
            *("hr-domina-hunting", "hr-savino-ocean", "hr-savino-palace", "hr3-crossroads"),
            *("hr3-hell", "hr3-icyland", "hr3-mirror"),
        ),
    ),
    Package(
        "hyperrogue-music",
        "CC-BY-SA-4.0; some files CC0-1.0 or CC-BY-3.0",
        "effects",
        r"/(?!hr)[^/]*\.ogg$",
        joined=True,
    ),
    Package(
        "singularity-music",
        "Creative Commons Attribution-ShareAlike",
        "music",
        OGG,
        held_out=(
            *("A-New-Journey", "Chimes-They-Fade", "March-Thee-to-Dis", "Media-Threat"),
            *("Orbital-Elevator", "Through-Space"),
        ),
    ),
    Package(
        "ufoai-music",
        "GPL-2+; some tracks CC-BY-3.0, CC-BY-SA-3.0, GPL-2 or public domain",
        "music",
        OGG,
        held_out=(
            *("Crystan-Battlescape05", "Crystan-Battlescape06", "Crystan-Credits", "David02"),
            *("David03", "MarineAlienRaid", "MarineIndustrial", "PsymongR3", "greecei"),
            *("turinItalyM", "van-geoscape", "van-mission3"),
        ),
    ),
    Package(
        "ufoai-sound",
        "GPL-2+; some files CC-BY-3.0, CC-BY-SA-3.0, GPL-2 or public domain",
        "effects",
        OGG,
        joined=True,
    ),
    Package("openttd-opensfx", CC_BY_SA, "effects", WAV, joined=True),
    Package(
        "hedgewars-data",
        "GFDL-1.3; Droplet*.ogg CC-BY-SA-3.0",
        "effects",
        r"Data/Sounds/((?:.*/)?)[^/]+\.ogg$",
        joined=True,
    ),
    Package("sonic-pi-samples", "CC0 or MIT, by sample", "effects", r"/([^/_]+)_.*\.flac$", True),
    Package(
        "hydrogen-drumkits",
        "GPL-2, GPL-2+ or CC-BY-SA-3.0, by kit",
        "percussion",
        rf"/drumkits/({'|'.join(KITS)})/[^/]+\.(wav|flac|aiff?)$",
        joined=True,
    ),
)

# what plays and speaks: licence of the sound font, and of the speech synthesiser's voice data
SOUND_FONT = Package("fluid-soundfont-gm", "MIT", "instruments", r"\.sf2$")
SPEAKER = Package("espeak-ng", "GPL-3+", "tts", r"")
TOOLS = ("fluidsynth", "espeak-ng")
TEXTS = "tuxpaint-stamps-default"  # GPL-2: one sentence in many languages in each of its .txt files

# hours that are rendered. Those of recordings are what there is
RENDERED_HOURS = {
    "notes": 5.0,  # one program: melodies, chords, single notes of every pitch
    "bands": 4.0,  # several programs and drums
    "drums": 1.5,  # patterns of one kit: the kits and sonic-pi's samples
    "tts": 6.0,
    "mixtures": 9.0,  # two or three pieces of the others at random levels, in rooms
}
