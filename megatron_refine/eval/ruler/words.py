"""Plain English words for keys and word lists. No word is part of another, so that containment cannot mistake one."""

ADJECTIVES = """
abrupt absent abundant acidic active adept adjacent adult aerial afraid alert alien alike alive amber ample amused
ancient angry annual anxious apparent arctic ardent arid artful ashen astute atomic auburn august autumnal average awake
aware awkward azure balanced bald bare bashful basic beaded bearded benign bent biased bitter bleak blessed blind blond
blunt bogus bold bony bossy bouncy boxy brainy brash brave brief bright brisk brittle broad bronze bruised bubbly bulky
bumpy buoyant burnt bushy busy calm candid canine careful casual cautious celtic central certain charming cheap cheerful
chewy chief chilly choosy chubby circular civic classic clean clear clever cloudy clumsy coarse coastal coherent
colossal comic common compact complex concise concrete confused content cool cordial correct cosmic costly cozy cramped
crazy creamy creepy crimson crinkly crisp crooked crucial crude cruel crusty cubic curious curly current curved daily
damp dapper daring dark dazzling dear decent deep deft deluxe demure dense devout digital direct dirty distant diverse
divine dizzy docile dogged domestic dorsal double doubtful dreamy droll dull durable dusky dusty dutiful earnest earthy
eastern eerie elated elder electric elegant elfin eligible elusive emerald eminent empty endless enormous equal ethical
evident exact exotic expert extinct fabled factual faded faint faithful false famous fancy fatal fearless feeble feline
fertile festive feudal fickle fiery final fiscal fishy fitting fixed flabby flaky flawed flexible floral fluent fluffy
fond foolish foreign formal fragile fragrant frail frank frequent fresh friendly frigid frosty frozen frugal fruity full
funny furry fussy future fuzzy gallant gaunt gentle genuine giant giddy gifted gigantic glad glamorous glass gleaming
global gloomy glorious glossy golden gothic graceful gradual grateful greasy great greedy gregarious grey gritty groggy
gross grumpy guilty gusty habitual hairy handsome handy happy hardy harmful harsh hasty haunted hazel hazy healthy
hearty heavy hefty helpful hidden hoarse hollow holy homely honest hopeful horrid hostile huge human humble humid hungry
hushed husky ideal idle immense impish inborn indigo inert infinite inky innate innocent instant intact intense iron
jade jagged jaunty jealous jolly jovial joyful juicy jumbo junior keen knotty known lanky lasting latent lavish lawful
lazy leafy learned legal lenient lethal level likely limber limp linear liquid lithe little lively living local lofty
lonely loose lost lovely loyal lucid lukewarm lunar magenta magic magnetic major manic marble massive mature meager meek
mellow merry messy metallic mighty mild minor minty misty mobile modern modest moist molten moody moral mossy muddy
muffled multiple murky musical musty mute mutual mystic naive narrow nasal native naval neat needy nervous neutral
nimble noble noisy normal northern numb nutty oblong obscure obvious olive only opaque open optimal orange orderly
organic ornate oval paired pale paltry parallel passive pastel patient peaceful pearly peculiar perfect perky petite
phony pink placid playful pleasant plucky plump plush poetic pointed polar polished polite poor porous portable posh
precise pretty previous prickly primal prime private profuse prompt proper proud prudent public puny pure purple puzzled
quaint quick quiet quirky radiant radical ragged random rapid rare ready recent reckless regal regular remote restless
robust rosy rotten rough rowdy royal rubbery ruddy rugged runny rural rustic sacred safe saline salty sandy sane
sarcastic satin savory scarce scarlet scenic scented scruffy sedate selfish senior serene serious severe shabby shady
shallow sharp sheer shiny short shrill silent silky silly silver simple sincere skinny sleek sleepy slender slick slight
slimy slippery sloppy slow small smart smoky smooth snappy sneaky snowy soapy sober social soft solar solemn solid
somber sonic sore soupy sour southern spare sparkling sparse special spicy spiky spiral splendid spooky spotted square
squeaky stable stale stark starry static steady sterile sticky stiff still stingy stony stormy stout strict striped
strong stubborn sturdy subtle sudden sugary sulky sunny superb supple surly sweet swift swollen tacit tame tangled tangy
tardy tart tasty taut tedious tender tepid terse thankful thick thorny thrifty tidy tight timely timid tinted tiny tired
tough toxic tragic tranquil trendy tricky trim tropical true trusty twin ugly ultra unique united upbeat upper upright
upset urgent useful usual vacant vague valiant valid vast velvet verbal vibrant vicious viral virtual visible vital
vivid vocal volatile wacky wary watery wavy weak wealthy weary weekly weird western whole wicked wide wild willing
wilted windy winged wintry wiry wise wistful witty wobbly wooden woolly worldly worn worthy wrinkly wrong yearly yellow
young zany zealous zesty
""".split()

NOUNS = """
acorn admiral adobe agenda airport album alcove almond alphabet altar amulet anchor animal ankle antenna anvil apricot
apron aquarium arcade archer arena armor artist ascent aspen atlas attic author avenue award axle bacon badger bagel
baker balcony ballad balloon ballot bamboo banana bandage banjo banker banner barber barge barley barn baron barrel
basil basin basket bassoon battery bazaar beach beacon beaker beam bean beaver beetle beggar bell belt bench beverage
bicycle bishop bison blanket blazer blender blizzard blossom blouse boat bobcat boiler bonfire bonnet border bottle
boulder bouquet bowl bracelet bracket branch bread breeze brick bridge broker brook broom brother bucket buckle budget
buffalo bugle builder bullet bumper bundle bungalow bureau butcher butler butter button cabbage cabinet cable cactus
cafe calendar calf camel camera campus canal canary candle candy cannon canoe canteen canvas canyon captain caravan
carbon cargo carnival carpet carriage carrot cartoon cartridge cashew casino castle catalog cathedral cattle cavern
cedar ceiling celery cellar cement cereal chair chalk champion channel chapel chapter charcoal chariot chauffeur cheese
chef cherry chestnut chicken child chimney chip chisel chocolate choir church cider cigar cinema circle circus citizen
citrus city clam clarinet classroom claw clay cliff climate clinic clock closet cloth clover clown cobbler cobra cocoa
coconut cocoon coffee coffin coin collar college colony column comet compass concert condor cone coral cork corner
cottage cotton couch cougar council county courier cousin cowboy coyote crab cradle crane crater crayon creek crescent
crew cricket crocodile crown cruiser crumb crystal cube cucumber cupboard curb curry curtain cushion custard cymbal
cypress dagger dairy daisy dancer dandelion dawn deacon debate decade deck degree dentist deputy desert desk dessert
detective diamond diary dictionary diesel diet dinghy dinner diploma doctor doll dolphin donkey door dough dove dragon
drawer dress drill driver drum duchess duck duke dune dungeon dwarf eagle echo eclipse editor elbow elephant elevator
emblem emperor empire engine envelope epic equator ermine errand essay estate evening evergreen exit fabric factory
fairy falcon family farmer faucet fawn feast feather fence fern ferret ferry festival fiddle field film finch finger
fireplace flag flamingo flannel flask fleet flint flock floor flute foam folder foot forest fork fossil fountain frame
freezer freight frog fudge funnel furnace gadget galaxy gallery gallon garage gardener garland garlic gate gazelle gecko
geese general geyser ghost ginger giraffe girdle glacier glove glue goat goblet goblin goose gopher gorge gorilla gown
grain granary grandma grape grass gravel gravy grocer grove guard guest guide guitar gypsum hail hallway halo hammer
hammock hamster handle hangar harbor harness harvest hatchet hawk hazard hedge heir helmet herald herb hermit heron
herring highway hippo hockey holiday honey hood hoof hook horizon hornet horse hospital hostel hotel hound hour house
hurdle hurricane husband hyena iceberg icicle igloo iguana infant insect island ivory jackal jacket jaguar jail janitor
jasmine javelin jelly jewel jockey journal judge juggler jungle juniper jury kangaroo kayak kernel kettle kidney kimono
kingdom kiosk kitchen kite kitten knife knight koala label labor ladder ladle lagoon lake lamb lamp landlord lantern
lapel larch lasso latch lava lavender lawn lawyer leader leather lecture legend lemon lemur lentil leopard letter
library lichen lilac lily lime lizard llama lobby lobster locket locust lodge lotus lounge lynx lyric macaroon machine
magpie mailbox mallard mallet mammoth mandolin mango manor mantle maple marathon marigold market marmot maroon marsh
mason mattress mayor meadow medal melody melon menu merchant mermaid meteor metro microbe mill mineral mink minnow
minute mirror missile mitten moat mole monarch monkey month monument moon moose morning mosaic mosque mosquito motor
mountain mouse mouth muffin muscle museum mushroom mustard myth napkin nation nebula neck nectar needle nephew nettle
newspaper newt nickel niece noodle noon nose notebook novelist nozzle nurse nutmeg oasis ocean octopus officer olympian
omelet onion opal orbit orchard orchid organist ostrich outlaw oven owner oxygen oyster paddle page pagoda painter
pajamas palace palm pamphlet pancake panda panel panther pantry papaya parade parasol parcel parlor parrot parsley
partner pasta pastry pasture path patio pattern pavement pavilion peach peacock peanut pebble pecan pedal pelican pencil
penguin pepper perch perfume petal petunia pheasant phone photo piano pickle picnic pier pigeon pigment pilgrim pillar
pillow pilot pineapple pioneer pipe pirate piston pitcher pixel pizza planet plank plantain plaster platter plaza plow
plumber pocket podium poem police pollen pony poodle pool popcorn poplar poppy porch porcupine portrait possum poster
potato potter powder prairie prawn priest prince printer prism prison professor propeller prophet pudding puffin pulley
pumpkin puppet puppy purse pyramid python quail quarry quartz queen quill quilt quiver rabbit raccoon radar radio radish
raft railway rainbow raisin rake raspberry raven ravine razor reactor rebel receipt recipe reef referee refuge region
reindeer relic reptile reservoir resort ribbon rice rifle robin robot rocket rodeo roof rookie rooster root rose rotor
route ruby rudder ruin ruler saddle safari sailor salad salmon salon saloon sandal sandwich sapphire sardine satchel
saucer sauna sausage savanna scale scallop scarf scholar school science scissors scooter scorpion scout scroll sculptor
seagull seal season seat seaweed secretary seed senate sentry sergeant servant sesame settler shadow shampoo shark shawl
sheep shelf shell shepherd sheriff shield shingle shirt shoe shore shoulder shovel shower shrimp shrub shutter sibling
sickle sidewalk signal singer siren sister skeleton sketch skillet skirt skull skylark sled sleeve sleigh sloth smith
snail snake snorkel sock soda sofa soil soldier sonata song spade spaniel sparrow spatula spear sphere sphinx spice
spider spinach spleen sponge spoon sprout spruce squash squid squirrel stadium stage staircase stallion stamp station
statue steak steamer steeple stem stereo stirrup stomach stool stork stove stranger straw stream street string studio
submarine suburb subway suitcase sultan summit sunflower sunset surgeon swallow swamp swan sweater sword syrup tablet
tadpole tailor talon tambourine tangerine tank tapestry target tassel tavern taxi teacher teapot telescope temple tenant
tennis terrace theater thimble thistle thread throat throne thumb thunder ticket tiger timber toad toast tobacco toddler
toffee tomato tongue tooth topaz torch tornado tortoise tourist towel tower town tractor trail trapeze traveler treasure
trench triangle tribe tricycle trolley trombone trophy trousers trout truck trumpet trunk tuba tulip tuna tundra tunic
tunnel turban turbine turkey turnip turquoise turtle tusk tutor tuxedo twig typist umbrella uncle unicorn uniform
universe urchin valley valve vanilla vapor vase vault vegetable vehicle veil vein veranda vessel veteran viaduct village
vinegar viola violin viper visitor vitamin volcano voyage vulture waffle wagon waist waiter wallet walnut walrus
wardrobe warrior wasp watch wave weasel weaver wedding whale wheat wheel whisker whistle widow willow window wine winter
wizard wolf wombat wreath wren wrist yacht yard yarn yeast yogurt zebra zeppelin zinc zipper zodiac
""".split()

VERBS = """
abandon abolish absorb accept accuse achieve acquire adapt admire admit adopt advise afford amaze amend announce annoy
answer appear applaud approve argue arise arrange arrest arrive ascend assemble assign assist assume attach attack
attain attempt attend attract avoid await banish bargain bathe become befriend begin behave believe belong bestow betray
beware bind bite blame bleed blink blow blush boast borrow bother breathe breed bring brush bury calculate cancel
capture carry carve catch cause cease celebrate challenge chat cheat choose chop chuckle clap clarify climb cling
collapse collect combine comfort command commit compare compel compete complain compose compute conceal concede conclude
condemn conduct confess confirm conquer consent consider consist construct consult consume contain continue contribute
convert convince cook copy cough crash crawl create criticize cultivate curtsy damage dare dazzle deceive decide declare
decline decorate decrease dedicate defeat defend define delay delete deliver demand deny depart depend derive descend
describe deserve design desire destroy detach deter develop devote differ digest diminish disagree discard discover
discuss dismiss display dissolve distinguish disturb divide donate drift drink drip drop drown dwell embark embrace
emerge emit employ enable enchant encourage endure enforce engage enhance enjoy enlarge enlist enrich ensure entertain
envy erase erect escape establish estimate evade evaluate evolve examine exceed exchange exclude excuse exert exhale
exist expand expect explain explode explore export expose extend fail fall falter fasten feed feel fetch fight fill find
finish flatter flicker float flood flourish focus follow forbid forecast forget forgive forsake found frighten frown
fulfil gallop gamble gather generate gesture giggle glance glide glow gnaw govern grab grasp greet grind groan growl
guess halt happen haul hesitate hinder hoist hold hover howl hunt hurl hurry identify ignite ignore imagine imitate
immerse imply import impose impress improve include increase indicate indulge infer inflate inform inhabit inhale
inherit inject injure inquire insert insist inspect inspire install insult intend interrupt introduce invade invent
invest invite involve irritate isolate join joke jump justify keep kick kindle kiss kneel knit knock lack laugh launch
leap leave lift limit linger listen load locate lure maintain manage march marry marvel measure meddle mediate melt
memorize mention migrate mingle moan modify mourn mumble murmur mutter neglect negotiate nibble notice nourish nudge
obey object oblige observe obtain occupy occur offend offer omit operate oppose organize overcome overlook oversee
overtake pardon participate pause perceive perform perish permit persist persuade pester pinch plead please pledge
plunge ponder possess postpone pour praise pray precede predict prefer prepare prescribe preserve pretend prevail
prevent proceed proclaim produce prohibit promise promote pronounce propose prosper protect protest provide provoke
prune publish punish purchase pursue push qualify quarrel quench question quote ramble reach realize reassure recall
receive recite recognize recommend reconcile recover recruit reduce reflect refuse regain regret reinforce reject
rejoice relate relax release rely remain remark remember remind remove renew repair repeat repel reply report represent
rescue resemble resign resist resolve respond restore restrain resume retain retire retreat retrieve return reveal
revere revise revive reward rinse roam roar roast rotate sacrifice salute satisfy save scatter scold scorch scrape
scratch scream scribble scrub search seek seem seize select sell send separate shake share shatter shave shine shiver
shout shrink shrug shudder shun sigh simmer sink skip slap slide smell smile smuggle sneeze sniff snore soar soothe
speak specify spell spill splash split spoil sponsor spread sprinkle squeeze squint stagger stammer stare starve stay
steal steer stitch stoop stretch stride strike strive stroll struggle study stumble submit subscribe succeed suffer
suggest summon supply support suppose surprise surrender surround survey survive suspect suspend sustain swear sweep
swell swim swing tackle taste tear tease tell terrify thaw think thrive throw tickle toil tolerate topple toss touch
trace trade translate transmit traverse tread tremble trespass trigger twist unfold unlock unpack unravel vacate vanish
vary venture verify wade wander want warn wash waste welcome whimper whine whisper wince wipe wish withdraw wither
withstand wonder work worry worship wrap wrestle wriggle write yawn yearn yield zoom
""".split()
